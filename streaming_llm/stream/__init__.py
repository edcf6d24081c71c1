"""A stream of tokens through the cache: passes that commit or abort, and what is done to the stacks between them."""
