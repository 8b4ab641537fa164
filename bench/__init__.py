"""Benchmarks: what is measured, and how."""

from bench.harness import use_checkout

use_checkout()
