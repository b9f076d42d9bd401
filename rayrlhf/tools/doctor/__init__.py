"""`rayrlhf doctor`: checks of this machine; facts are gathered once, checks are pure."""
