"""From messages to token ids: the tokenizer and the chat rendering."""
