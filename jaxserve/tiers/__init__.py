"""The context cache: pages that were computed, kept by content in memory, on disk and in a store of many instances."""
