"""Proofs that need a CUDA GPU. They run where torch sees one, without network and without vLLM's dependencies."""
