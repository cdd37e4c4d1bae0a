"""A finished run on the Hugging Face Hub: its model card, the push, and the way back."""
