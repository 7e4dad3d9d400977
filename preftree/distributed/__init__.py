"""More than one process: launchers, rendezvous, ranks, sharding, and Gaudi's environment."""
