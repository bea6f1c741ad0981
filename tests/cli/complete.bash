# Print bash's completions of the last word: complete.bash SCRIPT WORD...
# shellcheck source=/dev/null
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function compopt { :; } # works only during a real completion
"$(complete -p tinyllama | sed 's/.*-F \([^ ]*\).*/\1/')" tinyllama
printf '%s\n' "${COMPREPLY[@]}"
