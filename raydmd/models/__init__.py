"""Networks behind one protocol: embedded ones, diffusers' families, and experts as copies or LoRA adapters."""
