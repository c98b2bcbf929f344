/* Generates text with a character model that export_model.py wrote.

   ./generate [PROMPT [LENGTH [TEMPERATURE [SEED]]]]

   PROMPT is the beginning of the text, LENGTH the number of characters after it. TEMPERATURE 0
   takes the most probable character. Memory is static: the state, one row of logits. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.c"

enum { VOCABULARY_SIZE = sizeof model_characters / sizeof model_characters[0] };

static model_state state;
static float logits[MODEL_OUTPUT_SIZE];

/* Returns the index of the character at the start of the text, or -1. */
static int find_character(const char *text)
{
    int token;
    for (token = 0; token < VOCABULARY_SIZE; ++token) {
        const size_t size = strlen(model_characters[token]);
        if (size > 0 && strncmp(text, model_characters[token], size) == 0) return token;
    }
    return -1;
}

/* Returns a number from 0 to 1, 1 excluded (xorshift32, Marsaglia 2003). */
static float random_number(uint32_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    return (float)(*seed >> 8) / 16777216.0f;
}

/* Draws the next character from the softmax of the logits divided by the temperature. */
static int draw_character(float temperature, uint32_t *seed)
{
    float total = 0.0f, threshold;
    int best = 0, token;
    for (token = 1; token < VOCABULARY_SIZE; ++token) {
        if (logits[token] > logits[best]) best = token;
    }
    if (temperature <= 0.0f) return best;
    for (token = 0; token < VOCABULARY_SIZE; ++token) total += expf((logits[token] - logits[best]) / temperature);
    threshold = random_number(seed) * total;
    for (token = 0; token < VOCABULARY_SIZE - 1; ++token) {
        threshold -= expf((logits[token] - logits[best]) / temperature);
        if (threshold < 0.0f) break;
    }
    return token;
}

int main(int argc, char **argv)
{
    const char *prompt = argc > 1 ? argv[1] : model_characters[0];
    const long length = argc > 2 ? strtol(argv[2], NULL, 10) : 500;
    const float temperature = argc > 3 ? strtof(argv[3], NULL) : 0.8f;
    uint32_t seed = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 10) : 1;
    long n;
    if (*prompt == '\0') {
        fprintf(stderr, "generate: the prompt must have at least one character\n");
        return 1;
    }
    seed = seed * 2654435769u + 1; /* neighboring seeds start far apart */
    if (seed == 0) seed = 1;
    model_reset(&state);
    while (*prompt != '\0') {
        const int token = find_character(prompt);
        if (token < 0) {
            fprintf(stderr, "generate: the model has no character for \"%s\"\n", prompt);
            return 1;
        }
        fputs(model_characters[token], stdout);
        model_step(&state, model_embedding[token], logits);
        prompt += strlen(model_characters[token]);
    }
    for (n = 0; n < length; ++n) {
        const int token = draw_character(temperature, &seed);
        fputs(model_characters[token], stdout);
        model_step(&state, model_embedding[token], logits);
    }
    putchar('\n');
    return 0;
}
