"""What a model is worth on code it has not seen: tasks from held-out modules, scores, two models compared."""
