"""Training one stage: state, optimiser, checkpoints, and the loop that reads once, downward."""
