"""Releases, one package at a time: `hatch run release:build|check|bump|graph|compat|names|weigh`."""
