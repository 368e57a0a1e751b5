"""What only the adapters of the engines share."""
