"""From a recipe to a result, under the names of the commands."""
