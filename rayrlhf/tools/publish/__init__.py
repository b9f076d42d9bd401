"""Publishing a run's model with a card made from its folder."""
