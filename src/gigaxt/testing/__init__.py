"""Tests for what others build on gigaxt; plain functions that raise AssertionError, with or without pytest."""

from gigaxt.testing.context import check_context

__all__ = ["check_context"]
