"""What is computed: symbols -> logits."""
