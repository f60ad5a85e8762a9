"""`cook serve`: the engine behind Tinker's protocol. An adapter on top of core, which knows no HTTP."""
