"""The routed models: settings, routers, execution, and the checkpoints that hold them."""
