"""From a trained model to a cheaper one: importance, options, library, scores, cost, search, distillation."""
