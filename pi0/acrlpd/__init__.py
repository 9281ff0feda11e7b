"""ACRLPD: an actor-critic on action chunks, from recorded episodes to online practice."""
