"""What engines in front of a model server share: HTTP, the chat side of a model, and answers out of pieces."""
