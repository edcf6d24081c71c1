"""What everything is made of: weighted tokens, positions, masks, the state of heads; nothing here knows of a cache."""
