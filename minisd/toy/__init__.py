"""Diffusion in one and two dimensions, where everything is known in closed form."""
