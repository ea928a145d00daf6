"""How good the pictures are, and the report that shows them."""
