"""The command line of ibpcore: options to configuration to one call."""
