"""What engines share about conversations: messages to tokens, tokens to text and tool calls, grammars of answers."""
