"""Lightning modules: a model, its loss, its optimiser and what is measured on the way."""
