"""Container images on the host: the pinned base image and the patched image made of it, over the engine's own API."""
