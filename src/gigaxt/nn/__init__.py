"""What is computed: modules on plain tensors."""
