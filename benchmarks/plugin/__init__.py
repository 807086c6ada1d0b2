"""What a model that is never changed loses on LR images, and what the plug-in gives back."""
