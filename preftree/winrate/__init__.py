"""How often one model's answers are preferred to another's: both orders, ties, length-controlled, with intervals."""
