"""Many engines that serve as one: some compute prompts, others go on from there."""
