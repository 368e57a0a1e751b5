"""Plan a deployment from the model's configuration, without a GPU: whether it fits, its command, and its speed."""
