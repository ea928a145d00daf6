"""What the compiler leaves in a folder, and what it must be told where it leaves nothing."""

from types import SimpleNamespace

import pytest

from cascade.errors import UserError
from cascade.parallel.before_code import MARK, Memory, compile_until_code, read_layout

ASSIGNMENT = """BufferAssignment:
allocation 0: size 100, page 0, thread-local:
 value: <1 add @0> (size=100,offset=0): f32[]
allocation 1: size 4096, page 0, parameter 3, shape |f32[4,128]| at ShapeIndex {}:
allocation 2: size 512, page 0, parameter 1, shape |f32[128]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 64, color 1, page 0, parameter 0, shape |f32[16]| at ShapeIndex {}:
allocation 4: size 24, page 0, output shape is |(s32[], /*index=5*/f32[2])|, maybe-live-out:
allocation 5: size 7, page 0, maybe-live-out:
allocation 6: size 9000, page 0, preallocated-temp:
 value: <2 copy, color 1, maybe-live-out @0> (size=9000,offset=0): f32[2250]
allocation 7: size 5000, color 1, page 0, preallocated-temp:
allocation 8: size 1, page 0, constant:
"""


def test_allocations_are_summed_by_what_they_are_for():
    assert read_layout(ASSIGNMENT) == Memory(
        argument=4096 + 512, donated=512, result=24 + 7, temporary=9000
    )


def test_a_compiler_that_leaves_nothing_is_told_of(tmp_path):
    (tmp_path / f"module.cpu_{MARK.replace('_after_', '_before_')}").write_text("")
    with pytest.raises(UserError, match="--machine-code"):
        compile_until_code(SimpleNamespace(compile=lambda: None), tmp_path)


def test_the_compilers_refusal_is_handed_on(tmp_path):
    def refuse():
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        compile_until_code(SimpleNamespace(compile=refuse), tmp_path)
