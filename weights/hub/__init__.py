"""The Hugging Face Hub: places, downloads, publishing, model cards."""
