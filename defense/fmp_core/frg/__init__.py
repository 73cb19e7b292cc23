"""Feature Reverse Generation: the images that a feature map reacts to, and the scores that rank feature maps by them.

``scorer.FeatureMapScorer`` scores maps, ``racing.race`` finds the lowest without scoring all, ``scores.lowest`` cuts N/p.
"""
