"""Captioned pictures on their way to training: sources, preprocessing, loader, builders."""
