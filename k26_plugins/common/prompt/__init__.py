"""From messages to token ids and from an answer's text to events: tokenizer, chat template, parsing of answers."""
