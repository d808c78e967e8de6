"""How good a latent is to generate from: a small diffusion transformer trained on it, and what it shows."""
