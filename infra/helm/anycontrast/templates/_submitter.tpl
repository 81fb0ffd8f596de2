{{/* Pods that talk to the head's job port from outside the Ray cluster. */}}

{{/* The pod that submits the RayJob's command and follows its log; KubeRay fills in the command. */}}
{{- define "anycontrast.submitterPod" -}}
{{- $submitter := .Values.job.submitter -}}
metadata:
  labels:
    {{- include "anycontrast.podLabels" (dict "root" . "component" "submitter") | nindent 4 }}
  {{- with .Values.pods.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  {{- include "anycontrast.submitterBasics" . | nindent 2 }}
  containers:
    - name: submitter
      {{- include "anycontrast.submitterContainer" . | nindent 6 }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ $submitter.ephemeralStorage | quote }}
{{- end -}}

{{- define "anycontrast.submitterBasics" -}}
securityContext:
  {{- include "anycontrast.podSecurityContext" . | nindent 2 }}
enableServiceLinks: false
serviceAccountName: {{ include "anycontrast.serviceAccountName" (dict "root" . "component" "submitter") | quote }}
automountServiceAccountToken: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "anycontrast.submitterContainer" -}}
{{- $submitter := .Values.job.submitter -}}
image: {{ include "anycontrast.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
env:
  - name: RAY_AUTH_MODE
    value: {{ .Values.auth.mode | quote }}
  {{- if eq .Values.auth.mode "token" }}
  {{- with include "anycontrast.tokenSecret" . }}
  - name: RAY_AUTH_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ . | quote }}
        key: auth_token
  {{- end }}
  {{- end }}
securityContext:
  {{- include "anycontrast.securityContext" (dict "root" .) | nindent 2 }}
resources:
  {{- include "anycontrast.resources" $submitter | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end -}}
