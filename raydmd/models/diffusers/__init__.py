"""Pretrained teachers that diffusers loads: one file a family, and what their folders must hold."""
