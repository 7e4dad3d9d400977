"""An adapter merged into its base model, verified against the two before it is called done."""
