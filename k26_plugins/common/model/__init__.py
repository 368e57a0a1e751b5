"""The model's facts and its small pieces: configuration, INT4, the router, rotary embedding."""
