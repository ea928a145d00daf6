"""A minute's training draws: each of eight prompts gives its own drawing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from cascade import config
from cascade.evaluation.retrieval import nearest
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, make_train_step

SIDE = 16
# Against what tests are compiled with: of hundreds of steps, quicker ones make up for it.
COMPILED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
PROMPTS = {
    "a red disc": ("ellipse", (220, 30, 40)),
    "a blue disc": ("ellipse", (40, 70, 220)),
    "a green square": ("rectangle", (40, 160, 60)),
    "a yellow square": ("rectangle", (240, 200, 40)),
    "an orange triangle": ("triangle", (245, 130, 30)),
    "a purple triangle": ("triangle", (130, 50, 160)),
    "a black cross": ("cross", (20, 20, 20)),
    "a pink cross": ("cross", (250, 140, 190)),
}


def drawing(shape: str, colour) -> np.ndarray:
    """A shape on white, float32 [SIDE, SIDE, 3] in [-1, 1]."""
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
    pen = ImageDraw.Draw(image)
    if shape == "ellipse":
        pen.ellipse((8, 8, 55, 55), fill=colour)
    elif shape == "rectangle":
        pen.rectangle((8, 8, 55, 55), fill=colour)
    elif shape == "triangle":
        pen.polygon([(32, 6), (58, 56), (6, 56)], fill=colour)
    else:
        pen.rectangle((24, 4, 39, 59), fill=colour)
        pen.rectangle((4, 24, 59, 39), fill=colour)
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 127.5 - 1.0


def test_each_prompt_draws_its_own_drawing():
    loaded = config.load("configs/emoji/demo_base.py")
    loaded.stage.resolution = SIDE
    loaded.stage.network.update(
        channel_mults=(1, 2), num_blocks=(1, 2), strides=(2, 2),
        self_attention=(False, True), text_attention=(False, True),
    )  # fmt: skip
    loaded.train.learning_rate.update(decay_steps=300, warmup_steps=20)
    stage, optimizer = Stage(loaded.stage), make_optimizer(loaded.train)
    encoder = ENCODERS["minilm"](max_length=loaded.stage.text_length, weights="")
    text_emb, text_mask = encoder.encode(list(PROMPTS))
    image = np.stack([drawing(*look) for look in PROMPTS.values()])

    key = jax.random.key(0)
    state = jax.jit(functools.partial(init_state, stage, optimizer))(key)
    step = jax.jit(
        make_train_step(stage, optimizer, loaded.train),
        donate_argnums=0,
        compiler_options=COMPILED,
    )
    rows = np.arange(32) % len(image)
    batch = jax.device_put(
        {"image": image[rows], "text_emb": text_emb[rows], "text_mask": text_mask[rows]}
    )
    for _ in range(300):
        state, _ = step(state, batch, key)

    cond = {"text_emb": jnp.asarray(text_emb), "text_mask": jnp.asarray(text_mask)}
    keys = jax.random.split(jax.random.key(1), len(image))
    settings = stage.settings(steps=20)
    null = jax.tree.map(jnp.zeros_like, cond)
    drawn = stage.draw(state.ema_params, cond, null, keys, settings, (SIDE, SIDE))
    assert nearest(np.asarray(drawn), image).tolist() == list(range(len(image)))
