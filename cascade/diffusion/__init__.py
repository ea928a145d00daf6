"""Diffusion as pure array functions: nothing here knows of networks, files or configs.

Time t runs from 0 (clean) to 1 (noise). Noise levels are given as logsnr, and

    alpha² = sigmoid(logsnr),   sigma² = sigmoid(-logsnr),   z_t = alpha_t x + sigma_t eps.
"""
