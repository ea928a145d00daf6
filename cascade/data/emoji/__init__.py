"""The emoji data set: real captioned drawings, and scenes composed of them, made on the spot."""
