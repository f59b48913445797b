"""Where layers go: devices and a model in, a plan that explains itself out. Pure."""
