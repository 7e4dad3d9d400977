"""A conversation with a base model and with what training made of it; votes become preference pairs."""
