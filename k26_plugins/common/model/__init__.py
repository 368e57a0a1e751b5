"""The model's configuration and its small building blocks: INT4 packing, router, rotary embedding."""
