"""What a fit trains, a stage at a time: where pairs come from, and what is compared."""
