"""From judged completions to changed parameters: advantages, losses, log-probs and the update."""
