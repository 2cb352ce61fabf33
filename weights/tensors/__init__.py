"""Tensors in safetensors files and folders: read, written, rewritten."""
