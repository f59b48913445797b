"""Generated from ``protos/uellm/v1``: do not edit."""
